"""The lab: a rehearsal fleet on one machine. A SIMULATION, never a place to serve from.

Real hosts (systemd, sshd, sudo, apt, a Docker of their own) in containers, with simulated GPUs and HCAs,
next to a package repository and an image registry of their own. Product code does not know that it
exists: what differs in the lab is inventory variables that a real site could set as well.

Rooms: `machine` (facts of the machine it runs on), `outer_engine` (the Docker that holds the hosts),
`images`, `packages` and `repository` (simulated vendor packages), `hardware` (profiles), `hosts`,
`services`, `inventory`, and `fleet` and `bringup`, which bring them together for tests and for
`commands`. `files/` is what runs on the hosts: the simulated kernel, and the payload of the packages.
"""
