"""The bundled configs, as YAML files; the first line of each is a comment that says what it is."""
