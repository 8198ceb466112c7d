"""The gateway: one OpenAI-compatible door to base, adapters, the agent and configured remotes (docs/gateway.md)."""
