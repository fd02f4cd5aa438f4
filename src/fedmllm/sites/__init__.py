"""One federation over several machines: the loop of `federation.py` with sites in place of clients.

A site is a party on a machine of its own. The server runs the experiment's rounds and holds no
party's data; a site trains with the very functions of an in-process run, on its own data. What
crosses the wire is in `wire.py`, what is agreed before any training in `handshake.py`. Bytes are
moved by NVFlare, which only `flare/` imports.
"""
