//! (module genes)
