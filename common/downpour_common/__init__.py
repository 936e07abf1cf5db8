"""What every Downpour process shares: messages, wire format, transports, parameter space, errors."""
