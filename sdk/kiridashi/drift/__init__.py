"""The drift watch: does a line still look as it did, and as the server's samples did? Without labels.

- ``statistics``: some twenty numbers of a frame and of what the model said of it.
- ``sampler``, ``rows``: noting them on the line, and the files that they go through.
- ``events``: what a frame can show, and how often at most.
- ``evidence``: what is held against these limits, frame by frame.
- ``thinning``: how far apart frames have to be.
- ``watch``: the whole as one state; ``report``: what is told of it.

Nothing but ``statistics``, ``events``, ``evidence``, ``thinning`` and ``watch`` imports numpy.
"""
