//! The page as one text: markup, style, libraries, data and the scripts that draw them.

use anyhow::Result;

use super::Data;

/// What every page begins with, by which it is known as ours.
pub const PAGE_BEGINNING: &[u8] = b"<!doctype html>\n<!-- A report of depthwise -->\n";

const MARKUP: &str = include_str!("page/report.html");
const STYLE: &str = include_str!("page/report.css");
const D3: &str = include_str!("vendor/d3.min.js");
const PLOT: &str = include_str!("vendor/plot.umd.min.js");
const LICENCES: &str = include_str!("vendor/LICENCES.txt");
/// The scripts, in the order in which they are run.
const SCRIPTS: [&str; 6] = [
    include_str!("page/data.js"),
    include_str!("page/table.js"),
    include_str!("page/charts.js"),
    include_str!("page/timeline.js"),
    include_str!("page/sections.js"),
    include_str!("page/main.js"),
];

/// The page of some data.
///
/// # Errors
/// If the data are no JSON.
pub(super) fn page(data: &Data) -> Result<String> {
    let json = embedded(&serde_json::to_string(data)?);
    let title = data.folders.iter().map(|folder| folder.name()).collect::<Vec<_>>().join(", ");
    let parts = [
        ("title", escaped(&title)),
        ("style", format!("{}\n{STYLE}", colours())),
        ("licences", escaped(LICENCES)),
        ("data", json),
        ("d3", D3.to_owned()),
        ("plot", PLOT.to_owned()),
        ("script", SCRIPTS.concat()),
    ];
    // The markup is cut at its places, so that nothing which is put in is searched for them.
    let mut page = String::from_utf8_lossy(PAGE_BEGINNING).into_owned();
    let mut rest = MARKUP;
    for (name, text) in parts {
        let place = format!("{{{{{name}}}}}");
        let (before, after) = rest.split_once(&place).expect("the markup has a place for each part, in order");
        page += before;
        page += &text;
        rest = after;
    }
    Ok(page + rest)
}

/// The colours of the project's figures, as variables of the style.
fn colours() -> String {
    let colours = plots::PALETTE.iter().enumerate();
    let variables = colours.map(|(index, [r, g, b])| format!("--series-{index}:#{r:02x}{g:02x}{b:02x};"));
    format!(":root{{{}}}", variables.collect::<String>())
}

/// JSON that no text in it can end the script of.
fn embedded(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// A text in HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_neither_the_script_nor_an_element() {
        assert_eq!(embedded(r#"["</script><!--"]"#), r#"["\u003c/script>\u003c!--"]"#);
        assert_eq!(escaped(r#"<a href="b">&"#), "&lt;a href=&quot;b&quot;&gt;&amp;");
    }

    #[test]
    fn libraries_and_scripts_end_no_script_early() {
        for text in [D3, PLOT].iter().chain(&SCRIPTS) {
            assert!(!text.to_lowercase().contains("</script") && !text.contains("<!--"));
        }
    }
}
