"""The page on which people name frames: a process of its own, standard library only, nothing leaves the device."""
