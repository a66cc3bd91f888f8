"""Split learning as mathematics: what is computed, what is exchanged, in what order. No network, no files, no loop.

`RunSpec` describes a run; all else here follows from it. `step` is one step as the parties take it, `fused` the same
step in one program, `schedule` the order of exchanges, `modes` how clients work together, `parties` what each party
does in an exchange, `traffic` the bytes.
"""
