//! Draws the browser. Each text passes [`fitted`], which makes it harmless.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};
use sprat_inside::Kind;
use sprat_session::text;

use crate::app::{App, View};
use crate::dialog::Dialog;
use crate::folder::Order;

/// Fewer columns or rows have no room for a list.
const COLUMNS_MIN: u16 = 60;
const ROWS_MIN: u16 = 16;

pub(crate) fn draw(app: &mut App, frame: &mut Frame<'_>) {
    let all = frame.area();
    if all.width < COLUMNS_MIN || all.height < ROWS_MIN {
        let small = [
            format!("The terminal is too small: {}x{}.", all.width, all.height),
            format!("sprat browse needs {COLUMNS_MIN}x{ROWS_MIN}."),
            "q ends.".to_owned(),
        ];
        let width = usize::from(all.width);
        let lines: Vec<Line<'_>> = small
            .iter()
            .map(|line| Line::raw(fitted(line, width)))
            .collect();
        frame.render_widget(Paragraph::new(lines), all);
        return;
    }
    let row = |y: u16| Rect {
        y,
        height: 1,
        ..all
    };
    title(app, frame, row(0));
    let body = Rect {
        y: 1,
        height: all.height - 3,
        ..all
    };
    match app.views.last() {
        None => snapshots(app, frame, body),
        Some(View::Folder(_)) => folder(app, frame, body),
        Some(View::Versions(_)) => versions(app, frame, body),
        Some(View::Preview(_)) => preview(app, frame, body),
    }
    message(app, frame, row(all.height - 2));
    keys(app, frame, row(all.height - 1));
    if app.dialog.is_some() {
        dialog(app, frame, body);
    }
}

/// Makes a text harmless, and cuts or fills it to a width.
fn fitted(text: &str, columns: usize) -> String {
    let mut shown = text::harmless_columns(text, columns);
    let width = Span::raw(&*shown).width();
    shown.extend(std::iter::repeat_n(' ', columns.saturating_sub(width)));
    shown
}

/// As [`fitted`], at the right side.
fn fitted_right(text: &str, columns: usize) -> String {
    let shown = text::harmless_columns(text, columns);
    let blanks = columns.saturating_sub(Span::raw(&*shown).width());
    format!("{:blanks$}{shown}", "")
}

fn title(app: &App, frame: &mut Frame<'_>, at: Rect) {
    let what = match app.views.last() {
        None => match app.snapshots.marked.len() {
            0 => app.target.clone(),
            marked => format!("{}  {marked} marked", app.target),
        },
        Some(View::Folder(folder)) => {
            let marked = app
                .marked(&folder.at)
                .map_or(0, std::collections::BTreeMap::len);
            match marked {
                0 => folder.at.shown(),
                marked => format!("{marked} marked  {}", folder.at.shown()),
            }
        }
        Some(View::Versions(versions)) => format!("versions of {}:{}", versions.job, versions.path),
        Some(View::Preview(preview)) => format!("{}  {}", preview.extent(), preview.at.shown()),
    };
    let line = fitted(&format!("sprat  {what}"), usize::from(at.width));
    let style = Style::new().add_modifier(Modifier::BOLD);
    frame.render_widget(Paragraph::new(Line::styled(line, style)), at);
}

fn message(app: &App, frame: &mut Frame<'_>, at: Rect) {
    let waits = app.waits_for().map(|(what, since)| {
        let mut line = what.to_owned();
        if !app.progress.is_empty() {
            line = format!("{line}: {}", app.progress);
        }
        match since.elapsed().as_secs() {
            0 => format!("{line} …"),
            seconds => format!("{line} … {seconds} s, Esc stops"),
        }
    });
    let sums = || match app.views.last() {
        Some(View::Folder(folder)) => {
            if !app.message.is_empty() {
                return app.message.clone();
            }
            let more = match folder.more {
                0 => String::new(),
                more => format!("{} more are not shown", text::count(more)),
            };
            // It counts all entries, at each drawing.
            let summed_up = folder.sums_up.then(|| folder.summed_up(&app.sizes));
            match summed_up.filter(|(known, all)| known < all) {
                Some((known, all)) => format!("sizes: {known} of {all} folders, Esc stops  {more}"),
                None => more,
            }
        }
        _ => app.message.clone(),
    };
    let line = waits.unwrap_or_else(sums);
    let line = fitted(&line, usize::from(at.width));
    frame.render_widget(Paragraph::new(Line::raw(line)), at);
}

fn keys(app: &App, frame: &mut Frame<'_>, at: Rect) {
    let keys = match (&app.dialog, app.views.last()) {
        (Some(Dialog::Where { .. }), _) => "Enter continue  Esc cancel",
        (Some(Dialog::Confirm { replaces: true, .. }), _) => {
            "o overwrite  k keep what is there  n keep what is newer  Esc cancel"
        }
        (Some(Dialog::Confirm { .. }), _) => "y restore  Esc cancel",
        (Some(Dialog::Restoring { .. }), _) => "Esc stop",
        (Some(Dialog::Text { .. }), _) => "Up Down scroll  any other key closes",
        (None, None) => "Enter open  Space mark  f frees  r restore  F5 reload  ? keys  q quit",
        (None, Some(View::Folder(_))) => {
            "Enter open  Left back  Space mark  s sort  z sizes  v versions  r restore  ? q"
        }
        (None, Some(View::Versions(_))) => {
            "Enter show in its folder  p preview  r restore  Left back  ? keys  q quit"
        }
        (None, Some(View::Preview(_))) => {
            "Up Down PgUp PgDn scroll  v versions  r restore  Left back  ? keys  q quit"
        }
    };
    let line = fitted(keys, usize::from(at.width));
    let style = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Paragraph::new(Line::styled(line, style)), at);
}

/// A column: its title, its width, and whether it is aligned at the right. The last one takes what is left.
type Column = (&'static str, usize, bool);

fn row(cells: &[String], columns: &[Column], width: usize) -> String {
    let mut line = String::new();
    let mut left = width;
    for (number, ((_, wanted, is_right), cell)) in columns.iter().zip(cells).enumerate() {
        let is_last = number + 1 == columns.len();
        let its = if is_last { left } else { (*wanted).min(left) };
        line.push_str(&match is_right {
            true => fitted_right(cell, its),
            false => fitted(cell, its),
        });
        left -= its;
        if !is_last && left > 0 {
            line.push(' ');
            left -= 1;
        }
    }
    line
}

/// Draws a table: `range` of its rows, each with a style, and the cursor.
fn table(
    frame: &mut Frame<'_>,
    at: Rect,
    columns: &[Column],
    rows: impl Iterator<Item = (usize, Vec<String>, Style)>,
    cursor: usize,
) {
    let width = usize::from(at.width);
    let titles: Vec<String> = columns
        .iter()
        .map(|(title, ..)| (*title).to_owned())
        .collect();
    let head = Style::new().add_modifier(Modifier::UNDERLINED);
    let mut lines = vec![Line::styled(row(&titles, columns, width), head)];
    for (number, cells, style) in rows {
        let style = match number == cursor {
            true => style.add_modifier(Modifier::REVERSED),
            false => style,
        };
        lines.push(Line::styled(row(&cells, columns, width), style));
    }
    frame.render_widget(Paragraph::new(lines), at);
}

fn height(at: Rect) -> usize {
    usize::from(at.height.saturating_sub(1))
}

fn snapshots(app: &mut App, frame: &mut Frame<'_>, at: Rect) {
    let list = &mut app.snapshots;
    if list.entries.is_empty() {
        if app.waits_for().is_none() {
            let line = Line::raw("no snapshots yet");
            frame.render_widget(Paragraph::new(line), at);
        }
        return;
    }
    let range = list.rows.shown(height(at), list.entries.len());
    let jobs = list.entries[range.clone()].iter();
    let job = jobs.map(|entry| Span::raw(&*entry.job).width()).max();
    let columns = [
        (" ", 1, false),
        ("JOB", job.unwrap_or(0).clamp(3, 16), false),
        ("SNAPSHOT", 20, false),
        ("TIME", 16, false),
        ("SIZE", 8, true),
        ("STATE", 0, false),
    ];
    let (list, shown) = (&app.snapshots, &app.shown);
    let rows = range.map(|row| (row, list.cells(row, shown), Style::new()));
    table(frame, at, &columns, rows, list.rows.cursor);
}

fn folder(app: &mut App, frame: &mut Frame<'_>, at: Rect) {
    let Some(View::Folder(folder)) = app.views.last_mut() else {
        return;
    };
    let range = folder.rows.shown(height(at), folder.entries.len());
    let Some(View::Folder(folder)) = app.views.last() else {
        return;
    };
    if folder.entries.is_empty() {
        frame.render_widget(Paragraph::new(Line::raw("the folder is empty")), at);
        return;
    }
    let (size, name) = match folder.order {
        Order::Name => ("SIZE", "NAME ↓"),
        Order::Size => ("SIZE ↓", "NAME"),
    };
    let columns = [
        (" ", 1, false),
        ("MODE", 10, false),
        (size, 8, true),
        ("MODIFIED", 16, false),
        (name, 0, false),
    ];
    let marked = app.marked(&folder.at);
    let rows = range.map(|row| {
        let entry = folder.entries.get(row);
        let is_marked = entry
            .zip(marked)
            .is_some_and(|(entry, marked)| marked.contains_key(&entry.path));
        let style = match entry.filter(|_| app.colours) {
            Some(entry) => colour(entry.found.kind, entry.found.mode),
            None => Style::new(),
        };
        let cells = folder.cells(row, is_marked, &app.sizes, &app.shown);
        (row, cells, style)
    });
    table(frame, at, &columns, rows, folder.rows.cursor);
}

/// As `ls` colours it by default.
fn colour(kind: Kind, mode: u32) -> Style {
    let colour = match kind {
        Kind::Folder => Color::Blue,
        Kind::Link => Color::Cyan,
        Kind::BlockDevice | Kind::CharacterDevice | Kind::Fifo => Color::Yellow,
        Kind::Socket => Color::Magenta,
        Kind::File if mode & 0o111 != 0 => Color::Green,
        Kind::File => return Style::new(),
    };
    Style::new().fg(colour)
}

fn versions(app: &mut App, frame: &mut Frame<'_>, at: Rect) {
    let Some(View::Versions(versions)) = app.views.last_mut() else {
        return;
    };
    let range = versions.rows.shown(height(at), versions.versions.len());
    let columns = [
        ("FROM", 16, false),
        ("TO", 16, false),
        ("COUNT", 5, true),
        ("SIZE", 8, true),
        ("MODIFIED", 16, false),
        ("CHANGE", 0, false),
    ];
    let rows = range.map(|row| (row, versions.cells(row, &app.shown), Style::new()));
    table(frame, at, &columns, rows, versions.rows.cursor);
}

fn preview(app: &mut App, frame: &mut Frame<'_>, at: Rect) {
    let Some(View::Preview(preview)) = app.views.last_mut() else {
        return;
    };
    let width = usize::from(at.width);
    let count = preview.lines(width).len();
    let range = preview.rows.scrolled(usize::from(at.height), count);
    let lines: Vec<Line<'_>> = preview.lines(width)[range]
        .iter()
        .map(|line| Line::raw(fitted(line, width)))
        .collect();
    frame.render_widget(Paragraph::new(lines), at);
}

fn dialog(app: &mut App, frame: &mut Frame<'_>, body: Rect) {
    let at = Rect {
        x: body.x + 2,
        y: body.y + 1,
        width: body.width - 4,
        height: body.height - 2,
    };
    let inside = Rect {
        x: at.x + 2,
        y: at.y + 1,
        width: at.width - 4,
        height: at.height - 2,
    };
    let width = usize::from(inside.width);
    let height = usize::from(inside.height);
    let (title, lines) = match &mut app.dialog {
        None => return,
        Some(Dialog::Text { title, lines, rows }) => {
            let lines = wrapped(lines, width);
            let range = rows.scrolled(height, lines.len());
            (title.clone(), lines[range].to_vec())
        }
        Some(Dialog::Confirm {
            lines,
            rows,
            replaces,
            ..
        }) => {
            let mut lines = wrapped(lines, width);
            if *replaces {
                lines.push(String::new());
                lines.push("Files that are there already would be replaced.".to_owned());
            }
            let range = rows.scrolled(height, lines.len());
            ("Restore?".to_owned(), lines[range].to_vec())
        }
        Some(Dialog::Where { what, typed, spec }) => {
            let below = match spec.paths.is_empty() && spec.path.is_some() {
                true => "It goes into the folder under its own name.",
                false => "Each file keeps its full path below the folder.",
            };
            let lines = [what.as_str(), "", "To the folder:", "", "", below];
            let mut lines = wrapped(&lines.map(str::to_owned), width);
            let place = lines.iter().position(|line| line == "To the folder:");
            if let Some(place) = place {
                lines[place + 1] = format!("> {}_", end_of(typed, width.saturating_sub(4)));
            }
            ("Restore".to_owned(), lines)
        }
        Some(Dialog::Restoring { to }) => {
            let to = format!("Restoring to {}", to.display());
            ("Restore".to_owned(), wrapped(&[to], width))
        }
    };
    let lines: Vec<Line<'_>> = lines
        .iter()
        .take(height)
        .map(|line| Line::raw(fitted(line, width)))
        .collect();
    frame.render_widget(Clear, at);
    frame.render_widget(Block::bordered().title(fitted(&title, title.len())), at);
    frame.render_widget(Paragraph::new(lines), inside);
}

/// The end of what was typed, if it is wider than its place.
fn end_of(typed: &str, columns: usize) -> &str {
    let mut from = 0;
    while Span::raw(&typed[from..]).width() > columns {
        from += typed[from..].chars().next().map_or(1, char::len_utf8);
    }
    &typed[from..]
}

/// Breaks lines at blanks where they are too wide; a word that is too wide is broken anywhere.
fn wrapped(lines: &[String], columns: usize) -> Vec<String> {
    let mut out = Vec::new();
    for line in lines {
        let mut rest = text::harmless(line);
        while Span::raw(&*rest).width() > columns {
            let mut end = 0;
            for (at, c) in rest.char_indices() {
                let next = at + c.len_utf8();
                if Span::raw(&rest[..next]).width() > columns {
                    break;
                }
                end = next;
            }
            let blank = rest[..end].rfind(' ').filter(|at| *at > columns / 2);
            let cut = blank.unwrap_or(end).max(1);
            let tail = rest[cut..].trim_start().to_owned();
            rest.truncate(cut);
            out.push(rest);
            rest = tail;
        }
        out.push(rest);
    }
    out
}
