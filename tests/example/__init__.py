"""The example application, its page, its demo, and the configuration that deploys it."""
