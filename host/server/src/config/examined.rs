//! Owns the examination of a config file. It receives the text and returns the readable part of the config, and all
//! errors and suspicious keys.

use std::time::Duration;

use dim_model::ident::KeyName;
use dim_model::suggestion::nearest;
use serde::Deserialize as _;

use super::findings::{Finding, Severity};
use super::reader::in_words;
use super::tree::{Node, Step};
use super::{Config, Delivery};

/// The sections of the file that belong to the host; all others belong to other programs.
pub(super) const SECTIONS: &[&str] = &[
    "ipfs",
    "plugins",
    "store",
    "outbox",
    "plugins_dir",
    "fleet",
    "limits",
    "replacement",
    "api",
    "topics",
    "names",
    "signing",
    "telemetry",
];

/// The known keys of the section `ipfs`. Other programs may have more keys there, and in its section `pubsub`.
const IPFS: &[&str] = &[
    "api_url",
    "api_authorization",
    "ipns_key_name",
    "registry_ipns",
    "jobs_ipns",
    "adopt",
    "follow_every",
    "pubsub",
];
const PUBSUB: &[&str] = &["job_updates", "node_heartbeat", "results_ready", "node_status"];

/// The maximum of `limits.plugins`.
const MAX_PLUGINS: usize = 900;

/// The minimum of durations after which something is repeated or expires.
const SECOND: Duration = Duration::from_secs(1);

/// The maximum of `limits.compile-time`, in CPU time.
const MAX_COMPILE_TIME: Duration = Duration::from_secs(3_600);

/// An examined config file.
#[derive(Debug)]
pub struct Examined {
    /// The config without its invalid values; `None` if nothing can be read.
    pub config: Option<Config>,
    /// The errors and suspicious keys, in the order of the file.
    pub findings: Vec<Finding>,
    root: Option<Node>,
}

impl Examined {
    /// Examines the text of a config file.
    pub fn of(text: &str) -> Self {
        let root = match Node::parse(text) {
            Ok(root) => root,
            Err(finding) => return Self { config: None, findings: vec![finding], root: None },
        };
        let mut readable = root.clone();
        let mut examined = Self { config: None, findings: Vec::new(), root: Some(root) };
        examined.config = loop {
            let wrong = match Config::deserialize(&readable) {
                Ok(config) => break Some(config),
                Err(wrong) => wrong,
            };
            examined.findings.push(wrong.finding());
            // The rest may have errors, too.
            if !readable.remove(&wrong.path()) {
                break None;
            }
        };
        examined.tell_unknown_sections();
        if let Some(config) = examined.config.clone() {
            examined.tell_contradictions(&config);
            examined.tell_unknown_keys(&config);
        }
        examined.sort();
        examined
    }

    /// Adds a finding about a path of keys. The caller calls [`Self::sort`] afterwards.
    pub fn tell(&mut self, severity: Severity, path: &[&str], message: impl Into<String>) {
        let path: Vec<Step> = path.iter().map(|key| Step::Key((*key).to_owned())).collect();
        let mut steps = path.as_slice();
        // A default has no place in the file: the finding points to the section that would contain it.
        let place = loop {
            match self.root.as_ref().and_then(|root| root.find(steps)) {
                Some((_, at)) if !steps.is_empty() => break Some(at),
                _ if steps.is_empty() => break None,
                _ => steps = &steps[..steps.len() - 1],
            }
        };
        let (path, message) = (in_words(&path), message.into());
        self.findings.push(Finding::new(severity, path, place, message));
    }

    /// Sorts the findings in the order of the file.
    pub fn sort(&mut self) {
        self.findings.sort_by_key(|finding| (finding.line, finding.column));
    }

    /// Returns whether the file has an error, so that the host does not start with it.
    pub fn is_wrong(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }

    /// Reports a key that the host does not know, with the key that was perhaps meant.
    fn tell_unknown(&mut self, path: &[&str], meant: Option<&str>) {
        match meant {
            Some(meant) => {
                let why = format!("the host does not know this key and ignores it; did you mean `{meant}`?");
                self.tell(Severity::Warning, path, why);
            }
            None => self.tell(Severity::Note, path, "left to other programs"),
        }
    }

    fn tell_unknown_sections(&mut self) {
        let sections = self.root.iter().flat_map(|root| root.entries()).map(|entry| entry.key.clone());
        let unknown: Vec<String> = sections.filter(|key| !SECTIONS.contains(&key.as_str())).collect();
        for key in &unknown {
            let plugin = dim_bundled::component(key).is_some().then(|| format!("plugins.{key}"));
            self.tell_unknown(&[key], plugin.as_deref().or_else(|| nearest(key, SECTIONS.iter().copied())));
        }
    }

    /// Reports unknown keys in sections that other programs may share, and names of plugins that are perhaps
    /// misspelt.
    fn tell_unknown_keys(&mut self, config: &Config) {
        for key in config.ipfs.other.keys() {
            self.tell_unknown(&["ipfs", key], nearest(key, IPFS.iter().copied()));
        }
        for key in config.ipfs.pubsub.other.keys() {
            self.tell_unknown(&["ipfs", "pubsub", key], nearest(key, PUBSUB.iter().copied()));
        }
        let without_file = config.plugins.iter().filter(|(_, plugin)| plugin.file.is_none());
        for (name, _) in without_file.filter(|(name, _)| dim_bundled::component(name.as_str()).is_none()) {
            if let Some(meant) = nearest(name.as_str(), dim_bundled::names()) {
                let why = format!("no plugin of this name comes with the host; did you mean `{meant}`?");
                self.tell(Severity::Warning, &["plugins", name.as_str()], why);
            }
        }
    }

    /// Reports values that are out of range or contradict each other.
    fn tell_contradictions(&mut self, config: &Config) {
        if let Err(error) = config.ipfs.ipns_key_name.parse::<KeyName>() {
            self.tell(Severity::Error, &["ipfs", "ipns_key_name"], error.to_string());
        }
        let limits = &config.limits;
        let plugins = format!("the maximum is {MAX_PLUGINS}");
        let required: [(bool, &[&str], &str); 7] = [
            (
                config.fleet.is_valid(),
                &["fleet", "name"],
                "it must be 1 to 64 letters, digits, points, hyphens and underscores",
            ),
            (
                config.store.dead_letters.max_count > 0,
                &["store", "dead_letters", "max_count"],
                "it must be at least 1",
            ),
            (
                config.store.memory_bytes >= 1 << 20,
                &["store", "memory_bytes"],
                "it must be at least 1 MiB (1048576)",
            ),
            (
                (SECOND..=MAX_COMPILE_TIME).contains(&limits.compile_time),
                &["limits", "compile-time"],
                "it must be between 1s and 1h",
            ),
            (limits.plugins <= MAX_PLUGINS, &["limits", "plugins"], &plugins),
            (config.api.connections > 0, &["api", "connections"], "it must be at least 1"),
            (config.outbox.expire_after >= SECOND, &["outbox", "expire_after"], "it must be at least 1s"),
        ];
        for (_, path, why) in required.into_iter().filter(|(is_right, ..)| !is_right) {
            self.tell(Severity::Error, path, why);
        }
        for (pattern, topic) in &config.topics {
            if topic.peers.is_none() && topic.delivery.is_none() {
                let why = "`peers` is missing: name the accepted peers, or set `delivery: reliable`";
                self.tell(Severity::Error, &["topics", &pattern.to_string()], why);
            }
            let is_plain = topic.delivery.is_none_or(|delivery| delivery == Delivery::Plain);
            let without_effect =
                [("retention", !topic.retention.is_default()), ("from", !topic.from.is_head())];
            for (key, _) in without_effect.into_iter().filter(|(_, is_set)| is_plain && *is_set) {
                let why = "it has no effect unless `delivery: reliable` or `both` stands beside it";
                self.tell(Severity::Warning, &["topics", &pattern.to_string(), key], why);
            }
            if topic.encrypt && topic.delivery != Some(Delivery::Reliable) {
                let why = "`delivery: reliable` must stand beside it: plain messages are not encrypted";
                self.tell(Severity::Error, &["topics", &pattern.to_string(), "encrypt"], why);
            } else if topic.encrypt && config.fleet.name.is_stated() && !config.fleet.has_roster() {
                let why = "encrypted topics need a fleet with a roster: `fleet.name` must be the name that `dim fleet init` prints, or absent";
                self.tell(Severity::Error, &["topics", &pattern.to_string(), "encrypt"], why);
            }
            if topic.group.is_some() && !topic.encrypt {
                let why = "it has no effect unless `encrypt: true` stands beside it";
                self.tell(Severity::Warning, &["topics", &pattern.to_string(), "group"], why);
            }
            if topic.mirror && is_plain {
                let why = "`delivery: reliable` or `both` must stand beside it: a mirror keeps nothing of a plain topic";
                self.tell(Severity::Error, &["topics", &pattern.to_string(), "mirror"], why);
            }
        }
        for (key, name) in &config.names {
            if name.encrypt && config.fleet.name.is_stated() && !config.fleet.has_roster() {
                let why = "encrypted documents need a fleet with a roster: `fleet.name` must be the name that `dim fleet init` prints, or absent";
                self.tell(Severity::Error, &["names", key.as_str(), "encrypt"], why);
            }
            if name.group.is_some() && !name.encrypt {
                let why = "it has no effect unless `encrypt: true` stands beside it";
                self.tell(Severity::Warning, &["names", key.as_str(), "group"], why);
            }
        }
        for (name, plugin) in &config.plugins {
            if let Some(over) = limits.over_ceiling(&plugin.limits) {
                let why = format!("{over} (limits.ceiling)");
                self.tell(Severity::Error, &["plugins", name.as_str(), "limits"], why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HeaderText;
    use super::*;
    use dim_model::ident::PluginName;
    use dim_store::grants::Grants;

    /// The findings about a file, without their places.
    fn told(text: &str) -> Vec<String> {
        let findings = Examined::of(text).findings;
        findings.iter().map(|it| format!("{:?} {}", it.severity, it.path)).collect()
    }

    #[test]
    fn a_misspelt_key_is_told_and_what_is_of_other_programs_is_left_alone() {
        let text = "ipfs:\n  api_ur: x\n  timeout: 5\n  pubsub:\n    job_update: y\ntopic: {}\nsignings: {}\n\
                    plugin: {}\njob-tracker: {}\nregistry:\n  ? [1, 2]\n  : .nan\nplugins: { job-traker: {} }\n";
        assert_eq!(
            told(text),
            [
                "Warning ipfs.api_ur",
                "Note ipfs.timeout",
                "Warning ipfs.pubsub.job_update",
                "Warning topic",
                "Warning signings",
                "Warning plugin",
                "Warning job-tracker",
                "Note registry",
                "Warning plugins.job-traker",
            ]
        );
        let config = Config::parse(text).unwrap();
        let meant = |path: &str| config.notices().iter().find(|it| it.path == path).unwrap().to_string();
        assert!(meant("topic").starts_with("line 6, column 1: topic: "), "{}", meant("topic"));
        assert!(meant("topic").ends_with("did you mean `topics`?"), "{}", meant("topic"));
        assert!(meant("job-tracker").ends_with("did you mean `plugins.job-tracker`?"));
        let why = Config::parse("store:\n  log:\n    max_byte: 5\n").unwrap_err();
        assert!(why.contains("line 3") && why.contains("did you mean `max_bytes`?"), "{why}");
    }

    #[test]
    fn keys_of_reliable_topics_need_their_delivery_beside_them() {
        let text = |delivery: &str| {
            format!("topics:\n  a.*: {{ {delivery}from: 2h, retention: {{ time: 1h }}, mirror: true }}\n")
        };
        assert_eq!(told(&text("delivery: reliable, ")), [""; 0]);
        let findings = ["Warning topics.a.*.from", "Warning topics.a.*.retention", "Error topics.a.*.mirror"];
        let mut plain = told(&text("delivery: plain, "));
        plain.sort();
        let mut expected = findings;
        expected.sort_unstable();
        assert_eq!(plain, expected);
    }

    #[test]
    fn a_duration_is_text_with_a_unit_or_a_number_in_the_unit_of_its_key() {
        let read = |value: &str| {
            let text =
                format!("outbox: {{ expire_after: {value} }}\nstore: {{ log: {{ max_age: {value} }} }}\n");
            Config::parse(&text).map(|it| (it.outbox.expire_after.as_secs(), it.store.log.max_age.as_secs()))
        };
        for (value, durations) in [
            ("30s", (30, 30)),
            ("\"1h30m\"", (5_400, 5_400)),
            ("7d", (604_800, 604_800)),
            ("2", (2, 7_200)),
            ("\"2\"", (2, 7_200)),
        ] {
            assert_eq!(read(value).unwrap(), durations, "{value}");
        }
        for value in ["-1", "1.5", "true", "soon", "-5s", "\"\"", "[]", "{}", "500ms"] {
            assert!(read(value).is_err(), "{value}");
        }
        let error = read("true").unwrap_err();
        let expected = "expected a duration as in 30s, 5m or 2d, or a whole number of seconds";
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn earlier_names_of_durations_are_read() {
        let text = "store: { log: { max_age_hours: 1 }, dead_letters: { max_age_hours: 2 } }\n\
                    replacement: { undo_hours: 3, probation: { seconds: 4, max_seconds: 5 } }\n\
                    limits: { compile-seconds: 6 }\nipfs: { follow_every: 7 }\noutbox: { expire_after: 8 }\n";
        let config = Config::parse(text).unwrap();
        let read = [
            config.store.log.max_age,
            config.store.dead_letters.max_age,
            config.replacement.undo_time,
            config.replacement.probation.time,
            config.replacement.probation.max_time,
            config.limits.compile_time,
            config.ipfs.follow_every,
            config.outbox.expire_after,
        ];
        assert_eq!(read.map(|time| time.as_secs()), [3_600, 7_200, 10_800, 4, 5, 6, 7, 8]);
        assert!(Config::parse("replacement: { undo_hours: 3, undo_time: 3h }").is_err());
    }

    #[test]
    fn an_empty_section_is_an_empty_section_everywhere() {
        let sections = SECTIONS.iter().filter(|it| **it != "plugins_dir");
        for section in sections {
            for empty in ["", " ~", " null", "\n  # all of it is commented out"] {
                let read = Config::parse(&format!("{section}:{empty}\n"));
                assert!(read.is_ok(), "{section}:{empty}: {read:?}");
            }
        }
        for path in [
            "ipfs.pubsub",
            "store.log",
            "store.dead_letters",
            "limits.default",
            "limits.ceiling",
            "replacement.probation",
            "replacement.trusted",
            "signing.signers",
            "signing.unsigned",
            "telemetry.headers",
            "plugins.job-tracker",
            "plugins.job-tracker.config",
            "plugins.job-tracker.grants",
            "plugins.job-tracker.grants.publish",
            "plugins.job-tracker.limits",
            "topics.a.peers",
        ] {
            let indented =
                path.split('.').enumerate().map(|(depth, key)| format!("{}{key}:\n", "  ".repeat(depth)));
            let text: String = indented.collect();
            assert!(Config::parse(&text).is_ok(), "{text}{:?}", Config::parse(&text));
        }
        assert!(Config::parse("# only comments\n").is_ok());
        let config = Config::parse("plugins:\n  job-tracker:\n    grants:\n").unwrap();
        let job_tracker: PluginName = "job-tracker".parse().unwrap();
        assert_eq!(config.plugins[&job_tracker].grants, Some(Grants::default()), "nothing is granted");
        // A protected topic without `peers` would have no effect, so a plain topic needs the key.
        let why = Config::parse("topics:\n  dim.nodes.*:\n").unwrap_err();
        assert!(why.contains("topics.dim.nodes.*: `peers` is missing"), "{why}");
        Config::parse("topics:\n  dim.nodes.*: { delivery: reliable }\n").unwrap();
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once_with_its_place() {
        let why = Config::parse(
            "ipfs:\n  follow_every: soon\n  ipns_key_name: ../x\ntopics:\n  a: { peers: [nobody] }\n\
             signing: { unsigned: maybe }\noutbox: { expire_after: 0 }\nstore: { durability: eventually }\n",
        )
        .unwrap_err();
        let lines: Vec<&str> = why.lines().collect();
        assert_eq!(lines.len(), 6, "{why}");
        assert!(
            lines[0].starts_with("line 2, column 3: ipfs.follow_every: write it like 30s, 5m, 1h30m or 2d"),
            "{why}"
        );
        assert!(lines[1].starts_with("line 3, column 3: ipfs.ipns_key_name: "), "{why}");
        assert!(lines[2].starts_with("line 5, column 16: topics.a.peers[0]: "), "{why}");
        assert!(lines[3].starts_with("line 6, column 12: signing.unsigned: expected one of allow"), "{why}");
        assert!(lines[4].starts_with("line 7, column 11: outbox.expire_after: "), "{why}");
        assert!(lines[5].starts_with("line 8") && lines[5].contains("did you mean `eventual`?"), "{why}");
    }

    #[test]
    fn words_that_yaml_takes_for_booleans_and_numbers_are_what_they_are_wanted_for() {
        let text = "ipfs: { ipns_key_name: no, pubsub: { job_updates: 1.10, node_status: on } }\n\
                    plugins: { job-tracker: { disabled: yes }, node-registry: { disabled: off } }\n\
                    telemetry: { headers: { tenant: 1, debug: no, trace: true } }\nsigning: { signers: { } }\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.ipfs.ipns_key_name, "no");
        assert_eq!(config.ipfs.pubsub.job_updates.as_str(), "1.10");
        assert_eq!(config.ipfs.pubsub.node_status.as_str(), "on");
        assert_eq!(config.plugins.values().map(|it| it.disabled).collect::<Vec<_>>(), [true, false]);
        let plain = |name: &str| match &config.telemetry.headers[name] {
            HeaderText::Plain(text) => text.clone(),
            HeaderText::Secret(secret) => panic!("{secret:?}"),
        };
        assert_eq!([plain("tenant"), plain("debug"), plain("trace")], ["1", "no", "true"]);
    }
}
