"""The only package that imports libvirt: connections with deadlines, domains, networks, console, agent."""
