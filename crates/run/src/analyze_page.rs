//! The cost of snapshots as one page for a browser: no script, nothing fetched. Names are foreign text.
//!
//! Each drawing shows what a table on the page has in words. Its parts are links to that table, so a
//! keyboard reaches them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use jiff::civil::Date;
use sprat_inside::{AnalyzeReport, FolderCost, PathCost, SnapshotCost};
use sprat_session::text;

use crate::html::escaped;
use crate::treemap::{Area, squarified};

/// Rows of each list of files.
const PATHS_MAX: usize = 50;
/// The drawings, in their own units.
const WIDTH: f64 = 960.0;
const MAP_HEIGHT: f64 = 540.0;
const CURVE_HEIGHT: f64 = 240.0;
/// How deep folders are drawn in each other.
const DEPTH_MAX: usize = 5;
/// The height of a label, and the width of a character of it.
const LABEL: f64 = 18.0;
const CHARACTER: f64 = 7.2;
/// A folder with so much of the one that it is alone in is drawn in its place.
const LONE_PERCENT: u64 = 95;
/// A smaller folder is not drawn.
const SIDE_MIN: f64 = 6.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--back:#fff;--text:#1a1c1e;--soft:#55595e;--edge:#c9cdd2;--focus:#b3261e;\
--d0:#e3ecf7;--d1:#cfe0f3;--d2:#b7d0ee;--d3:#9fc0e8;--d4:#86afe1;--bar:#8a5a00;--curve:#0b57a4}\
@media(prefers-color-scheme:dark){:root{--back:#15181b;--text:#e6e8ea;--soft:#a6abb1;--edge:#3d4349;\
--focus:#ffb4ab;--d0:#1c2733;--d1:#223347;--d2:#29405b;--d3:#304e70;--d4:#385c86;--bar:#d9a441;--curve:#8ab8ee}}\
*{box-sizing:border-box}\
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:62rem;padding:1rem;color:var(--text);\
background:var(--back)}\
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .5rem}\
p,figcaption{color:var(--soft)}figure{margin:0;overflow-x:auto}svg{width:100%;min-width:40rem;height:auto;\
display:block}\
.wide{overflow-x:auto;border:1px solid var(--edge);max-height:32rem}\
table{border-collapse:collapse;width:100%}\
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge);\
font-variant-numeric:tabular-nums}\
thead th{position:sticky;top:0;background:var(--back)}\
th:first-child,td.name{text-align:left}\
tbody th{font-weight:normal;font-family:ui-monospace,monospace;text-align:left}\
tr:target{background:var(--d1)}\
text{font:12px ui-monospace,monospace;fill:var(--text)}\
rect{stroke:var(--back);stroke-width:1}\
.d0{fill:var(--d0)}.d1{fill:var(--d1)}.d2{fill:var(--d2)}.d3{fill:var(--d3)}.d4{fill:var(--d4)}\
.bar{fill:var(--bar);stroke:none}.curve{fill:none;stroke:var(--curve);stroke-width:2}\
a:focus-visible{outline:3px solid var(--focus)}a:focus-visible>rect{stroke:var(--focus);stroke-width:3}\
.wide:focus-visible,figure:focus-visible{outline:3px solid var(--focus)}";

/// The page. `full_on`: when the volume is full, if that is known.
#[must_use]
pub fn page(report: &AnalyzeReport, target: &str, full_on: Option<Date>) -> String {
    let mut out = String::new();
    let target = escaped(&text::harmless(target));
    // Writing to a String can't fail.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Cost of snapshots: {target}</title><style>{STYLE}</style></head><body><main>\n\
         <h1>Cost of snapshots: {target}</h1>\n<p>{} take {} together, of which folders take {}.",
        text::counted(report.snapshots.len() as u64, "snapshot", "snapshots"),
        text::bytes(report.bytes),
        text::bytes(report.folder_bytes),
    );
    if let Some(day) = full_on {
        let _ = write!(
            out,
            " If the volume grows as in the last 30 days, it is full on {day}."
        );
    }
    if let Some(note) = crate::analyze_text::note(report) {
        let _ = write!(out, " {note}.");
    }
    out.push_str("</p>\n");
    removal(&mut out, report);
    let newest_first: Vec<&SnapshotCost> = by_time(report).into_iter().rev().collect();
    growth(&mut out, report);
    table(
        &mut out,
        "snapshots",
        "Snapshots",
        &["Snapshot", "Files", "Size", "New", "Only here"],
        newest_first.iter().map(|one| {
            (
                format!("{}/{}", one.job, one.snapshot),
                vec![
                    text::count(one.files),
                    text::bytes(one.bytes),
                    text::bytes(one.new_bytes),
                    text::bytes(one.own_bytes),
                ],
            )
        }),
    );
    map(&mut out, &report.biggest_folders);
    table(
        &mut out,
        "folders",
        "Biggest folders of the newest snapshots",
        &["Folder", "Files", "Size"],
        report.biggest_folders.iter().map(|one| {
            (
                format!("{}:{}", one.job, one.path),
                vec![text::count(one.files), text::bytes(one.bytes)],
            )
        }),
    );
    paths(&mut out, "biggest", "Biggest files", &report.biggest);
    paths(
        &mut out,
        "changed",
        "Most often changed",
        &report.most_changed,
    );
    paths(
        &mut out,
        "expensive",
        "Most expensive, all versions together",
        &report.most_expensive,
    );
    out.push_str("</main></body></html>\n");
    out
}

fn removal(out: &mut String, report: &AnalyzeReport) {
    if let Some(removal) = &report.removal {
        let names = removal.snapshots.iter().map(|name| text::harmless(name));
        let _ = writeln!(
            out,
            "<p>Removing {} frees {} ({}).</p>",
            escaped(&names.collect::<Vec<_>>().join(", ")),
            text::bytes(removal.frees_bytes),
            text::counted(removal.frees_objects, "file or folder", "files and folders")
        );
    }
}

/// The snapshots, oldest first.
fn by_time(report: &AnalyzeReport) -> Vec<&SnapshotCost> {
    let mut all: Vec<&SnapshotCost> = report.snapshots.iter().collect();
    all.sort_by(|one, other| one.snapshot.cmp(&other.snapshot));
    all
}

/// What each run added, and the sum.
fn growth(out: &mut String, report: &AnalyzeReport) {
    let all = by_time(report);
    let (Some(first), Some(last)) = (all.first(), all.last()) else {
        return;
    };
    let sum: u64 = all.iter().map(|one| one.new_bytes).sum();
    let (left, bottom) = (8.0, CURVE_HEIGHT - 24.0);
    let step = (WIDTH - 2.0 * left) / all.len() as f64;
    let height = |bytes: u64| (bottom - LABEL) * bytes as f64 / sum.max(1) as f64;
    let (mut bars, mut points) = (String::new(), format!("{left:.1},{bottom:.1}"));
    let mut together = 0;
    for (number, one) in all.iter().enumerate() {
        together += one.new_bytes;
        let x = left + step * number as f64;
        let tall = height(one.new_bytes).max(1.0);
        let _ = write!(
            bars,
            "<rect class=\"bar\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"><title>{}</title></rect>",
            bottom - tall,
            (step - 1.0).max(0.5),
            escaped(&format!(
                "{}/{}: {} new, {} in all",
                one.job,
                text::harmless(&one.snapshot),
                text::bytes(one.new_bytes),
                text::bytes(together)
            ))
        );
        let _ = write!(points, " {:.1},{:.1}", x + step, bottom - height(together));
    }
    let day = |one: &SnapshotCost| {
        let name = text::harmless(&one.snapshot);
        escaped(&name.chars().take(10).collect::<String>())
    };
    let _ = writeln!(
        out,
        "<h2 id=\"growth\">Growth</h2><figure tabindex=\"0\"><svg viewBox=\"0 0 {WIDTH} {CURVE_HEIGHT}\" role=\"img\" \
         aria-label=\"Growth from {} to {}: {} in all. The table of snapshots has the numbers.\">\
         {bars}<polyline class=\"curve\" points=\"{points}\"/>\
         <text x=\"{left}\" y=\"12\">{}</text>\
         <text x=\"{left}\" y=\"{y}\">{}</text>\
         <text x=\"{right}\" y=\"{y}\" text-anchor=\"end\">{}</text></svg>\
         <figcaption>Bars: what each run added. Curve: what the snapshots take together.</figcaption></figure>",
        day(first),
        day(last),
        text::bytes(sum),
        text::bytes(sum),
        day(first),
        day(last),
        y = CURVE_HEIGHT - 6.0,
        right = WIDTH - left,
    );
}

/// The folders as rectangles in each other.
fn map(out: &mut String, folders: &[FolderCost]) {
    if folders.is_empty() {
        return;
    }
    let mut map = Map::default();
    let places: BTreeMap<(&str, &Path), usize> = (0..)
        .zip(folders)
        .map(|(number, one)| ((&*one.job, Path::new(&*one.path)), number))
        .collect();
    for (number, one) in folders.iter().enumerate() {
        let parent = Path::new(&one.path).parent();
        let parent = parent.and_then(|parent| places.get(&(&*one.job, parent)));
        match parent {
            Some(parent) => map.children.entry(*parent).or_default().push(number),
            None => map.tops.push(number),
        }
    }
    let area = Area {
        x: 0.0,
        y: 0.0,
        width: WIDTH,
        height: MAP_HEIGHT,
    };
    let _ = write!(
        out,
        "<h2 id=\"map\">Folders</h2><figure><svg viewBox=\"0 0 {WIDTH} {MAP_HEIGHT}\" role=\"group\" \
         aria-label=\"Folders by size. Each part is a link to its row in the table of the biggest folders.\">"
    );
    map.draw(out, folders, &map.tops, area, 0);
    out.push_str(
        "</svg><figcaption>The area of a folder is what it takes. Its row in the table below is one click \
         away.</figcaption></figure>\n",
    );
}

/// Which folders are in which. Numbers are places in the list.
#[derive(Debug, Default)]
struct Map {
    tops: Vec<usize>,
    children: BTreeMap<usize, Vec<usize>>,
}

impl Map {
    /// The folder that is drawn for this one: the only one in it, if that has nearly all of it.
    fn widest(&self, folders: &[FolderCost], mut number: usize) -> usize {
        while let Some([only]) = self.children.get(&number).map(Vec::as_slice)
            && folders[*only].bytes >= folders[number].bytes / 100 * LONE_PERCENT
        {
            number = *only;
        }
        number
    }

    fn draw(
        &self,
        out: &mut String,
        folders: &[FolderCost],
        shown: &[usize],
        area: Area,
        depth: usize,
    ) {
        let sizes: Vec<f64> = shown.iter().map(|one| folders[*one].bytes as f64).collect();
        for (number, at) in shown.iter().zip(squarified(&sizes, area)) {
            if at.width < SIDE_MIN || at.height < SIDE_MIN {
                continue;
            }
            let number = &self.widest(folders, *number);
            let one = &folders[*number];
            let name = format!("{}:{}", one.job, text::harmless(&one.path));
            let _ = write!(
                out,
                "<a href=\"#folders-{number}\" aria-label=\"{}\"><rect class=\"d{}\" x=\"{:.1}\" y=\"{:.1}\" \
                 width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
                escaped(&format!("{name}, {}", text::bytes(one.bytes))),
                depth.min(4),
                at.x,
                at.y,
                at.width,
                at.height,
                escaped(&format!("{name}, {}", text::bytes(one.bytes))),
            );
            let label = match (depth, Path::new(&one.path).file_name()) {
                (0, _) | (_, None) => name,
                (_, Some(last)) => text::harmless(&last.to_string_lossy()),
            };
            let has_label = at.height >= LABEL && at.width >= 4.0 * CHARACTER;
            if has_label {
                let room = at.width - 8.0;
                let with_size = format!("{label} {}", text::bytes(one.bytes));
                let label = match cut(&with_size, room) {
                    whole if whole == with_size => whole,
                    _ => cut(&label, room),
                };
                let _ = write!(
                    out,
                    "<text aria-hidden=\"true\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    at.x + 4.0,
                    at.y + 13.0,
                    escaped(&label)
                );
            }
            out.push_str("</a>");
            if let Some(children) = self.children.get(number).filter(|_| depth < DEPTH_MAX) {
                let top = if has_label { LABEL } else { 2.0 };
                // What is no listed folder keeps its part of the area.
                let inside = at.within(2.0, top);
                let own = one.bytes.max(1) as f64;
                let listed: f64 = children.iter().map(|one| folders[*one].bytes as f64).sum();
                let share = (listed / own).min(1.0);
                let part = match inside.width >= inside.height {
                    true => Area {
                        width: inside.width * share,
                        ..inside
                    },
                    false => Area {
                        height: inside.height * share,
                        ..inside
                    },
                };
                self.draw(out, folders, children, part, depth + 1);
            }
        }
    }
}

/// As much of a label as fits.
fn cut(label: &str, width: f64) -> String {
    let fits = (1..=label.chars().count())
        .take_while(|count| *count as f64 * CHARACTER <= width)
        .count();
    match fits < label.chars().count() {
        true => {
            let begin: String = label.chars().take(fits.saturating_sub(1)).collect();
            begin + "…"
        }
        false => label.to_owned(),
    }
}

fn paths(out: &mut String, id: &str, title: &str, paths: &[PathCost]) {
    table(
        out,
        id,
        title,
        &["File", "Versions", "Newest version", "All versions"],
        paths.iter().take(PATHS_MAX).map(|one| {
            (
                format!("{}:{}", one.job, one.path),
                vec![
                    text::count(one.versions),
                    text::bytes(one.bytes),
                    text::bytes(one.all_bytes),
                ],
            )
        }),
    );
}

/// A table whose rows begin with a name. Row N can be linked to as `ID-N`.
fn table(
    out: &mut String,
    id: &str,
    title: &str,
    head: &[&str],
    rows: impl ExactSizeIterator<Item = (String, Vec<String>)>,
) {
    if rows.len() == 0 {
        return;
    }
    let _ = write!(
        out,
        "<h2 id=\"{id}\">{title}</h2>\n<div class=\"wide\" role=\"region\" aria-labelledby=\"{id}\" \
         tabindex=\"0\"><table><thead><tr>"
    );
    for cell in head {
        let _ = write!(out, "<th scope=\"col\">{cell}</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for (number, (name, cells)) in rows.enumerate() {
        let name = escaped(&text::harmless(&name));
        let _ = write!(
            out,
            "<tr id=\"{id}-{number}\"><th scope=\"row\">{name}</th>"
        );
        for cell in cells {
            let _ = write!(out, "<td>{cell}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &str, bytes: u64) -> FolderCost {
        FolderCost {
            job: "home".to_owned(),
            path: path.to_owned(),
            files: 3,
            bytes,
        }
    }

    #[test]
    fn names_are_text_and_nothing_is_fetched() {
        let hostile = "/a\"><script>alert(1)</script><img src=http://x onerror='y'>&";
        let path = PathCost {
            job: "home".to_owned(),
            path: hostile.to_owned(),
            versions: 2,
            bytes: 10,
            all_bytes: 20,
        };
        let report = AnalyzeReport {
            biggest_folders: vec![folder("/", 100), folder(hostile, 60)],
            biggest: vec![path.clone()],
            most_changed: vec![path.clone()],
            most_expensive: vec![path],
            ..AnalyzeReport::default()
        };
        let page = page(&report, "x'\"<b>", None);
        // Tags are those that are written here.
        let tags = [
            "!doctype",
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "h1",
            "h2",
            "p",
            "div",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "figure",
            "figcaption",
            "svg",
            "a",
            "rect",
            "text",
            "polyline",
        ];
        for tag in page.split('<').skip(1) {
            let name: String = tag
                .trim_start_matches('/')
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '!')
                .collect();
            assert!(tags.contains(&&*name), "{tag}");
            let inside = tag.split('>').next().unwrap();
            let attributes: String = inside.split('"').step_by(2).collect();
            for bad in [" on", "src", "'", "&"] {
                assert!(!attributes.contains(bad), "{inside}");
            }
        }
        let shown = "home:/a&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=http://x \
                     onerror=&#39;y&#39;&gt;&amp;";
        assert!(page.matches(shown).count() >= 5, "{page}");
        assert!(page.contains("default-src 'none'"));
    }

    #[test]
    fn folder_lies_in_its_parent_and_links_to_its_row() {
        let report = AnalyzeReport {
            biggest_folders: vec![
                folder("/", 1000),
                folder("/home", 980),
                folder("/home/anna", 600),
                folder("/home/ben", 200),
            ],
            ..AnalyzeReport::default()
        };
        let page = page(&report, "laptop", None);
        for number in 0..4 {
            assert!(page.contains(&format!("<tr id=\"folders-{number}\"")));
            // The root has hardly more than the folder `home`.
            let is_drawn = page.contains(&format!("<a href=\"#folders-{number}\""));
            assert_eq!(is_drawn, number > 0, "{page}");
        }
        assert!(page.contains(">home:/home 980 B</text>"), "{page}");
        assert!(page.contains("home:/home/anna, 600 B"), "{page}");
        assert!(page.contains(">anna 600 B</text>"), "{page}");
        assert_eq!(cut("abcdefghij", 4.0 * CHARACTER), "abc…");
        assert_eq!(cut("abcd", 4.0 * CHARACTER), "abcd");
    }
}
