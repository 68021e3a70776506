//! Framers for serial devices: bytes to frames.
