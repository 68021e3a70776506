//! Access, routes, retained messages, sessions and their queues.
