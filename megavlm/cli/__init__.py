"""The command line: the table of commands, help, checks before a run, local processes, messages of failures."""
