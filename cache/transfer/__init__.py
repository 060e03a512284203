"""Blocks of the KV-cache from one group's host memory to another's, rank to rank.

An importing group asks rank 0 of an exporting one for blocks by their hashes. That one holds them
still in host memory for some seconds and gives out a *ticket*. With it each importing rank
fetches what it needs from the exporting ranks, whatever the two tensor-parallel sizes: the unit is
a *head piece*, one key/value head's part of a block, which is the same bytes at every size.

Modules, from below:

    failures, deadline   the one exception, and the bound on time
    addresses, stream    sockets that are bound to an address, and to a time
    keys, handshake      mutual authentication by a shared secret
    messages, connection authenticated frames
    ticket               what an exporter has promised, for how long
    slots, planning      head pieces in host memory, and who is asked for which
    transport            how the bytes of pieces travel: the one seam
    lending              what the server asks the engine
    server, client       the two ends
    mooncake             another transport

What is promised to whoever holds the fleet's secret, against anybody on the network who does not:

- *authenticity*: both ends prove that they know the secret, and that the server is the rank of the
  group, in the epoch, that was meant, before anything else is read or served;
- *integrity*: every frame carries a MAC, and every byte of a block is covered by a digest in one;
- *freshness*: session keys depend on random numbers of both sides and frames on their place in the
  session, so nothing of one session or direction counts in another, or twice.

Not promised: secrecy. Whoever can read the network can read keys and values. Holders of the secret
trust each other: the importer's name in a ticket guards against mistakes, not against them.
"""
