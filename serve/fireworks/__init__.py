"""The hosted path: the same dataset trained, deployed and fetched back over Fireworks' REST API."""
