"""The fleet side of the server: who the devices are, what they may fetch, and how it reaches them.

The rules are pure (:mod:`~kiridashi_server.fleet.desired`, :mod:`~kiridashi_server.fleet.answers`); files, the
database, the broker and the MQTT connection each have one module of their own, and
:class:`~kiridashi_server.fleet.server.PlantServer` ties them together over one state folder.
"""
