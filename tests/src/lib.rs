//! Stories, end to end, and the lab they run in.
