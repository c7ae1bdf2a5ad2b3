//! When a copy is due, overdue, and when it is next.
