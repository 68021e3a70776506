//! HTTP API, pages, live events, metrics.
