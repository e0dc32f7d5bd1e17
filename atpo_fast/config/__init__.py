"""Configuration: typed schema, YAML files, overrides."""
