//! Completions, by asking bash; manual pages as files.

mod common;

use common::Sandbox;

/// Asks bash what it would offer for the last of these words, as bash splits them.
fn offered(sandbox: &Sandbox, words: &str) -> Vec<String> {
    let line = format!(
        "source <(lacuna completions bash)
         COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
         _lacuna; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let got = sandbox.run(&line);
    assert_eq!(got.code, Some(0), "{words}: {}", got.text);
    got.text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn bash_completes_verbs_options_and_values() {
    let ours = Sandbox::ours();
    for (words, expected) in [
        ("lacuna con", &["conform", "convert"][..]),
        ("lacuna com", &["commit", "compare", "completions"]),
        ("lacuna --err", &["--error-format"]),
        ("lacuna --error-format = j", &["json"]),
        ("lacuna --error-format = json ma", &["man", "map"]),
        ("lacuna --error-format json inf", &["info"]),
        ("lacuna create -f q", &["qcow2"]),
        ("lacuna create --format = ''", &["qcow2", "raw"]),
        ("lacuna check --rep", &["--repair"]),
        ("lacuna check -r ''", &["leaks", "all"]),
        ("lacuna info --output j", &["json"]),
        ("lacuna convert --progress = ''", &["json", "none"]),
        // Bash goes on with files.
        ("lacuna convert -p d", &[]),
        ("lacuna create -b d", &[]),
        ("lacuna help inf", &["info"]),
        ("lacuna completions z", &["zsh"]),
    ] {
        assert_eq!(offered(&ours, words), expected, "{words}");
    }
}

#[test]
fn bash_offers_every_option_that_the_help_of_a_verb_has() {
    let ours = Sandbox::ours();
    for verb in offered(&ours, "lacuna ''") {
        let help = ours.run(&format!("lacuna help {verb}")).text;
        let (_, options) = help.split_once("\nOptions:\n").unwrap();
        let (options, _) = options.split_once("\n\n").unwrap();
        // The left column: `-f, --format FMT`, or six blanks and the long name.
        let names = options.lines().filter_map(|line| {
            let (_, name) = line.get(..34.min(line.len()))?.split_once("--")?;
            let is_name = line.starts_with("  -") || line.starts_with("      --");
            is_name.then(|| name.split([' ', '[']).next()).flatten()
        });
        let mut expected: Vec<String> = names.map(|name| format!("--{name}")).collect();
        let mut found = offered(&ours, &format!("lacuna {verb} --"));
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected, "{verb}");
    }
}

#[test]
fn all_pages_and_scripts_are_written_as_files() {
    let ours = Sandbox::ours();
    ours.prepare("lacuna man --all pages; lacuna completions --all scripts");
    assert_eq!(ours.run("ls scripts").text, "_lacuna\nlacuna.bash\nlacuna.fish\n");
    for verb in offered(&ours, "lacuna ''") {
        let page = ours.bytes(&format!("pages/lacuna-{verb}.1"));
        let printed = ours.command(&format!("lacuna man {verb}")).stdout;
        assert!(page == printed, "{verb}");
    }
    assert_eq!(ours.bytes("pages/lacuna.1"), ours.command("lacuna man").stdout);
    let got = ours.run("lacuna completions tcsh");
    assert_eq!(got.code, Some(1), "{}", got.text);
    assert_eq!(ours.run("lacuna man --all /dev/null/x").code, Some(1));
}
