"""The command line: `msjax train | eval | predict | export | models | serve | client`, one file a command."""
