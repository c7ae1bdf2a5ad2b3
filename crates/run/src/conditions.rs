//! Conditions of a copy: mains power, metered connections, interfaces, gateways and time windows.
