"""What a run found: ``schema`` is ``report.json`` for programs, ``page`` is ``report.html`` for people."""
