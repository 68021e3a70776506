//! The only SQL: schema and migrations, the one writer thread, group commit, quarantine.
