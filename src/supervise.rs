//! Start, restart policies, drain.
