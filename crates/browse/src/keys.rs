//! The loop of the thread that has the terminal: keys and answers in, questions and drawings out.

use std::io::stdin;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use sprat_session::Failure;
use sprat_session::interrupt::Interrupt;
use sprat_store::IgnorePoison;

use crate::answers::Stop;
use crate::app::{App, Key};
use crate::draw::draw;
use crate::question::{Event, Question};
use crate::rows::Move;
use crate::screen::{Screen, is_stale};

/// How long an answer, or a request to end, may wait for its turn.
const TURN: Duration = Duration::from_millis(50);
/// How often the seconds of what is waited for are drawn.
const REDRAW: Duration = Duration::from_millis(500);

/// Shows the browser until the user, an interrupt or the other thread ends it.
pub(crate) fn converse(
    app: &mut App,
    screen: &mut Screen,
    events: &Receiver<Event>,
    ask: &Sender<(u64, Question)>,
    stop: &Stop,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let failed =
        |error: std::io::Error| Failure::failed("the terminal can't be used").caused_by(&error);
    let mut is_changed = true;
    let mut drawn = Instant::now();
    loop {
        while let Some(asked) = app.next() {
            is_changed = true;
            if ask.send(asked).is_err() {
                return Ok(());
            }
        }
        if app.take_stop()
            && let Some(stopper) = &*stop.lock().ignore_poison()
        {
            stopper.stop();
        }
        if app.ends || interrupt.requested() {
            return Ok(());
        }
        if is_changed || is_stale() || (app.is_waiting() && drawn.elapsed() >= REDRAW) {
            screen.draw(|frame| draw(app, frame)).map_err(failed)?;
            (is_changed, drawn) = (false, Instant::now());
        }
        let mut has_event = false;
        // Of several keys that came together, all but the first wait in crossterm.
        for limit in [Duration::ZERO, TURN] {
            if !has_event && wait_for_input(limit).map_err(failed)? == Input::Ended {
                return Err(Failure::interrupted());
            }
            has_event = has_event || event::poll(Duration::ZERO).map_err(failed)?;
        }
        if has_event {
            is_changed = true;
            match event::read().map_err(failed)? {
                event::Event::Key(pressed) if pressed.kind != KeyEventKind::Release => {
                    press(app, pressed, interrupt);
                }
                _ => {}
            }
        }
        loop {
            match events.try_recv() {
                Ok(event) => {
                    is_changed = true;
                    app.hear(event);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Input {
    Waits,
    /// The terminal is gone: its window or its connection was closed.
    Ended,
}

/// Waits for input, not longer than `limit`. If the terminal is gone, crossterm would read without end.
fn wait_for_input(limit: Duration) -> std::io::Result<Input> {
    let input = stdin();
    let mut fds = [PollFd::new(&input, PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    match poll(&mut fds, limit.as_ref()) {
        // A signal: the terminal has another size, perhaps.
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
    Ok(match fds[0].revents().intersects(gone) {
        true => Input::Ended,
        false => Input::Waits,
    })
}

fn press(app: &mut App, pressed: KeyEvent, interrupt: &Interrupt) {
    let is_control = pressed.modifiers.contains(KeyModifiers::CONTROL);
    match pressed.code {
        // The terminal makes no signals of these keys now.
        KeyCode::Char('c' | '\\') if is_control => interrupt.request(),
        KeyCode::Char('z') if is_control => {
            let _ = kill_process(getpid(), Signal::TSTP);
        }
        code => {
            if let Some(key) = meaning(code, is_control, app.dialog.is_some()) {
                app.press(key);
            }
        }
    }
}

/// What a key means. In a dialog, letters are letters.
fn meaning(code: KeyCode, is_control: bool, in_dialog: bool) -> Option<Key> {
    Some(match code {
        KeyCode::Char('r') if is_control => Key::Reload,
        KeyCode::Char('h') if is_control => Key::Erase,
        KeyCode::Char(_) if is_control => return None,
        KeyCode::Up => Key::Move(Move::Up),
        KeyCode::Down => Key::Move(Move::Down),
        KeyCode::PageUp => Key::Move(Move::PageUp),
        KeyCode::PageDown => Key::Move(Move::PageDown),
        KeyCode::Home => Key::Move(Move::Begin),
        KeyCode::End => Key::Move(Move::End),
        KeyCode::Char('k') if !in_dialog => Key::Move(Move::Up),
        KeyCode::Char('j') if !in_dialog => Key::Move(Move::Down),
        KeyCode::Enter | KeyCode::Right => Key::Open,
        KeyCode::Left => Key::Back,
        KeyCode::Backspace => Key::Erase,
        KeyCode::Esc => Key::Escape,
        KeyCode::F(5) => Key::Reload,
        KeyCode::Char(letter) => Key::Letter(letter),
        _ => return None,
    })
}
