//! The gateway assembled: what runs, in which order it starts and stops, and what a reload changes.
