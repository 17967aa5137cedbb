"""Ways into an instance: ssh, guest agent, serial console, keys."""
