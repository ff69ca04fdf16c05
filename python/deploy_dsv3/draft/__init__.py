"""`deploy-dsv3 init`: a first inventory, with comments, from flags or from answers at a terminal.

Rooms: `answers` (what was wanted), `text` (the files it becomes; pure), `files` (checked and written),
`questions` (the terminal), `commands` (the command line).
"""
