"""From verified traces to a LoRA adapter."""
