"""The command line: the table of verbs, help texts, checks before a run, local processes and error messages."""
