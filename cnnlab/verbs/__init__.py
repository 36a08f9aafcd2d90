"""The verbs: `main(arguments) -> exit code`, one module each."""
