"""The bank: what past tasks taught about the backbone, one record a task."""
