"""All that crosses a process boundary: messages, keys, scripts, connections, errors."""
