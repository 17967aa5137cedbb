"""The verbs on instances: what the command line, a test or any other program calls."""
