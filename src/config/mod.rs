//! YAML to checked settings; every error with file:line:column, a snippet and a hint.
