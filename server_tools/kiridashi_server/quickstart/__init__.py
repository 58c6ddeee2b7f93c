"""The whole loop, once, on embedded defaults: what ``make quickstart`` runs."""
