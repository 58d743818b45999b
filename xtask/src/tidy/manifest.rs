//! Dependencies are guests: each has a reason, said once, in the workspace's manifest.

use super::Finding;

/// Which of our crates may stand on which, tests aside.
const OURS: [(&str, &[&str]); 9] = [
    ("crates/conform/", &["lacuna"]),
    ("crates/lacuna/", &[]),
    // Restore points of any disk: it knows no command line and no protocol.
    ("crates/lacuna-backup/", &["lacuna"]),
    (
        "crates/lacuna-cli/",
        &["lacuna", "lacuna-backup", "lacuna-conform", "lacuna-export", "lacuna-nbd", "lacuna-tls"],
    ),
    ("crates/lacuna-export/", &["lacuna", "lacuna-nbd", "lacuna-tls"]),
    // The protocol alone: it knows no disk.
    ("crates/lacuna-nbd/", &[]),
    // Certificates alone: it knows neither disks nor the protocol.
    ("crates/lacuna-tls/", &[]),
    ("crates/testkit/", &["lacuna", "lacuna-backup", "lacuna-conform", "lacuna-nbd"]),
    ("xtask/", &[]),
];

pub(super) fn check(path: &str, text: &str, findings: &mut Vec<Finding>) {
    // A package outside of the workspace is the root of one of its own.
    let is_root = path == "Cargo.toml" || text.lines().any(|line| line == "[workspace]");
    let mut section = "";
    let mut previous = "";
    for (index, line) in text.lines().map(str::trim).enumerate() {
        if line.starts_with('[') {
            section = line;
        } else if let Some((name, value)) = dependency(section, line) {
            let wrong = if is_root {
                without_reason(previous, value)
            } else {
                in_member(path, section, name, value)
            };
            if let Some(text) = wrong {
                findings.push(Finding { path: path.to_owned(), line: index + 1, text });
            }
        }
        previous = line;
    }
}

/// Returns name and value of a line that names a dependency.
fn dependency<'a>(section: &str, line: &'a str) -> Option<(&'a str, &'a str)> {
    let is_dependency = section.trim_end_matches(']').ends_with("dependencies");
    let (name, value) = line.split_once('=').filter(|_| is_dependency && !line.starts_with('#'))?;
    Some((name.trim(), value.trim()))
}

fn without_reason(previous: &str, value: &str) -> Option<String> {
    let is_ours = value.contains("path =");
    let has_reason = previous.starts_with('#') || value.contains('#');
    (!is_ours && !has_reason).then(|| "a dependency needs a comment that says why".into())
}

fn in_member(path: &str, section: &str, name: &str, value: &str) -> Option<String> {
    let base = name.split('.').next().unwrap_or(name);
    let (_, allowed) = OURS.iter().find(|(folder, _)| path.starts_with(folder))?;
    let is_named = |folder: &str| {
        let last = folder.trim_end_matches('/').rsplit('/').next().unwrap_or(folder);
        last == base || base.strip_prefix("lacuna-") == Some(last)
    };
    let is_ours = OURS.iter().any(|(folder, _)| is_named(folder));
    if is_ours && !section.contains("dev-") && !allowed.contains(&base) {
        return Some(format!("must not stand on `{base}` (no arrow points there)"));
    }
    let from_workspace = name.ends_with(".workspace") || value.contains("workspace = true");
    (!from_workspace).then(|| format!("`{base}`: version and reason belong in the workspace"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> usize {
        let mut findings = Vec::new();
        check(path, text, &mut findings);
        findings.len()
    }

    #[test]
    fn a_dependency_without_reason_is_found() {
        let head = "[workspace.dependencies]\n";
        assert_eq!(found("Cargo.toml", &format!("{head}serde = \"1\"")), 1);
        assert_eq!(found("Cargo.toml", &format!("{head}# Reads JSON.\nserde = \"1\"")), 0);
        assert_eq!(found("Cargo.toml", &format!("{head}serde = \"1\" # Reads JSON.")), 0);
        assert_eq!(found("Cargo.toml", &format!("{head}lacuna = {{ path = \"x\" }}")), 0);
    }

    #[test]
    fn a_package_on_its_own_has_its_own_versions_and_reasons() {
        let (path, head) = ("crates/conform/drivers/x/Cargo.toml", "[workspace]\n[dependencies]\n");
        assert_eq!(found(path, &format!("{head}# The engine.\nx = \"=1\"")), 0);
        assert_eq!(found(path, &format!("{head}x = \"=1\"")), 1);
    }

    #[test]
    fn members_take_versions_from_the_workspace() {
        let path = "crates/lacuna/Cargo.toml";
        assert_eq!(found(path, "[dependencies]\nzstd.workspace = true"), 0);
        assert_eq!(found(path, "[dependencies]\nzstd = \"1\""), 1);
        assert_eq!(found(path, "[package]\nname = \"lacuna\""), 0);
    }

    #[test]
    fn crates_stand_on_lower_ones_only() {
        let text = "[dependencies]\ntestkit.workspace = true";
        assert_eq!(found("crates/lacuna/Cargo.toml", text), 1);
        let text = "[dev-dependencies]\ntestkit.workspace = true";
        assert_eq!(found("crates/lacuna/Cargo.toml", text), 0);
        let text = "[dependencies]\nlacuna.workspace = true";
        assert_eq!(found("crates/lacuna-nbd/Cargo.toml", text), 1);
        let text = "[dependencies]\nlacuna-conform.workspace = true";
        assert_eq!(found("crates/lacuna-nbd/Cargo.toml", text), 1);
    }
}
