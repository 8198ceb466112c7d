"""The sections of understudy.yaml, each setting with its default, its bounds and its meaning; understudy.config puts them together."""
