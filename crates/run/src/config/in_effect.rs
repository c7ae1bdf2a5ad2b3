//! The keys that are checked and have no effect yet. Who gives one its effect takes it off the list.

/// Table and key. `config check` warns of each that is set.
const NOT_IN_EFFECT: &[(&str, &[&str])] = &[
    ("top", &["time_zone", "public_status", "watch"]),
    (
        "container",
        &[
            "before",
            "check_budget",
            "check_every",
            "drill_every",
            "finally",
            "hook_timeout",
            "lock_wait",
            "min_free",
            "trim",
            "upload_limit",
        ],
    ),
    (
        "job",
        &[
            "after",
            "alert_after",
            "at",
            "before",
            "change_limit",
            "every",
            "exclude_caches",
            "exclude_if_present",
            "exclude_larger_than",
            "exclude_sample",
            "failed",
            "finally",
            "growth",
            "growth_limit",
            "healthchecks",
            "hook_timeout",
            "keep_daily",
            "keep_hourly",
            "keep_last",
            "keep_monthly",
            "keep_weekly",
            "keep_within",
            "keep_yearly",
            "only_if_gateway_mac",
            "only_if_interface",
            "only_on_ac",
            "prune_every",
            "rsync_path",
            "skip_on_metered",
            "spread",
            "window",
        ],
    ),
    (
        "notify",
        &[
            "command",
            "desktop",
            "digest",
            "digest_at",
            "healthchecks",
            "mail",
            "metrics",
            "ntfy",
            "on",
            "remind_after",
            "webhook",
        ],
    ),
];

/// Begins the warning about a key without effect.
pub(super) const NOT_YET: &str = "not yet in effect";

/// What a snapshot would lack if it were ignored. A job that needs one of these is refused.
pub(super) const NOT_BUILT: &[&str] = &["sources on another host", "command", "system_state"];

/// Whether a key of a kind of table has no effect yet.
pub(super) fn is_without_effect(kind: &str, key: &str) -> bool {
    let mut of_kind = NOT_IN_EFFECT.iter().filter(|(table, _)| *table == kind);
    of_kind.any(|(_, keys)| keys.contains(&key))
}

/// Whether a job that needs this part of sprat is refused.
pub(super) fn is_not_built(what: &str) -> bool {
    NOT_BUILT.contains(&what)
}
