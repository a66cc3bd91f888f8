"""Split learning between many programs: who takes part, what is said, what survives a fault.

`membership` is the state of a run's membership and `transitions` its transitions, both pure; `coordinator` is the
server's side and `session` a client's, without any I/O; `channel` is what both ends see of their connection, which
`rpc` makes by gRPC. `server_program` and `client_program` are the ends as programs.
"""
