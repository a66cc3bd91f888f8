"""The command line: `msjax train | eval | models | serve | client`, one file a command."""
