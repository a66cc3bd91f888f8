"""The command line: `msjax train | eval | predict | models | serve | client`, one file a command."""
