//! Documents point to files that are there.

use std::path::Path;

use super::Finding;

pub(super) fn check(root: &Path, name: &str, text: &str, findings: &mut Vec<Finding>) {
    let folder = root.join(Path::new(name).parent().unwrap_or_else(|| Path::new("")));
    for (index, line) in text.lines().enumerate() {
        for target in targets(line).filter(|target| !folder.join(target).exists()) {
            let text = format!("links to `{target}`, which is not there");
            findings.push(Finding { path: name.to_owned(), line: index + 1, text });
        }
    }
}

/// Returns the local files that a line of Markdown links to.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let target = rest.split(')').next()?.split('#').next()?;
        let is_local = !target.is_empty() && !target.contains("://");
        is_local.then_some(target)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_link_is_found() {
        let root = crate::run::workspace();
        let mut findings = Vec::new();
        let text = "[us](Cargo.toml) [web](https://example.com) [here](#there)\n[x](none.md)";
        check(&root, "README.md", text, &mut findings);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, 2);
    }
}
