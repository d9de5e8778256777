//! (module objective)
