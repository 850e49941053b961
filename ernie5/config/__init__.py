"""The configuration mechanism: typed fields, YAML loading with file and line in every error, descriptions."""
