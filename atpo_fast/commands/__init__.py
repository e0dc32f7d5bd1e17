"""The command line: one module a verb, `cli.py` puts them together, `launcher.py` starts the processes of a run."""
