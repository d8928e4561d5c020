"""The report of one or more runs: read (runs), reckon (summary), draw (curves, gains), say (page)."""
