//! Trees there and back again.

use std::{
    fs::{self, File, Permissions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use super::*;

fn packed(path: &Path, name: &str) -> (Vec<u8>, Vec<String>) {
    let (mut out, mut skipped) = (Vec::new(), Vec::new());
    pack(path, Path::new(name), &mut out, &mut |what| skipped.push(what)).unwrap();
    (out, skipped)
}

fn unpacked(stream: &[u8], into: &Path) -> Result<Vec<String>, CopyError> {
    let mut skipped = Vec::new();
    unpack(stream, into, false, &mut |what| skipped.push(what)).map(|()| skipped)
}

#[test]
fn a_tree_arrives_with_its_modes_links_and_holes() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tree = source.path().join("tree");
    fs::create_dir_all(tree.join("locked/inner")).unwrap();
    fs::write(tree.join("locked/inner/script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("locked/inner/script"), Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(tree.join("locked"), Permissions::from_mode(0o555)).unwrap();
    symlink("/etc/passwd", tree.join("absolute")).unwrap();
    symlink("./locked//nothing", tree.join("dangling")).unwrap();
    symlink("/", tree.join("root")).unwrap();
    let far = format!("/{}", "f/".repeat(100));
    symlink(&far, tree.join("far")).unwrap();
    let long = "n".repeat(200);
    fs::write(tree.join(&long), "long").unwrap();
    let mut sparse = File::create(tree.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(64 << 20)).unwrap();
    sparse.write_all(b"end").unwrap();
    nix::unistd::mkfifo(&tree.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();

    let (stream, skipped) = packed(&tree, "copy");
    assert_eq!(skipped, [format!("{}: a pipe", tree.join("fifo").display())]);
    assert!(stream.len() < 1 << 20, "a hole costs nothing on the way: {}", stream.len());
    assert_eq!(unpacked(&stream, target.path()).unwrap(), Vec::<String>::new());

    let copy = target.path().join("copy");
    assert_eq!(fs::metadata(copy.join("locked/inner/script")).unwrap().mode() & 0o7777, 0o750, "no set-user-id bit");
    assert_eq!(fs::metadata(copy.join("locked")).unwrap().mode() & 0o777, 0o555);
    assert_eq!(fs::read_link(copy.join("absolute")).unwrap(), Path::new("/etc/passwd"));
    for (name, link) in [("dangling", "./locked//nothing"), ("root", "/")] {
        assert_eq!(fs::read_link(copy.join(name)).unwrap().as_os_str(), link);
    }
    assert_eq!(fs::read_link(copy.join("far")).unwrap(), Path::new(&far));
    assert_eq!(fs::read_to_string(copy.join(&long)).unwrap(), "long");
    let sparse = fs::read(copy.join("sparse")).unwrap();
    assert!(sparse.len() == (64 << 20) + 3 && sparse.ends_with(b"\0end"));
}

#[test]
fn a_file_may_take_another_s_place_and_a_directory_s_content_another_s() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(source.path().join("new"), "new").unwrap();
    fs::write(target.path().join("old"), "old").unwrap();
    unpacked(&packed(&source.path().join("new"), "old").0, target.path()).unwrap();
    assert_eq!(fs::read_to_string(target.path().join("old")).unwrap(), "new");
    unpacked(&packed(source.path(), ".").0, target.path()).unwrap();
    assert_eq!(fs::read_to_string(target.path().join("new")).unwrap(), "new");
}

#[test]
fn nothing_is_written_outside() {
    let (outer, hostile) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let into = outer.path().join("into");
    fs::create_dir(&into).unwrap();

    // A link that leads out, then a file through it.
    symlink(outer.path(), hostile.path().join("way")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_path_with_name(hostile.path().join("way"), "way").unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, "way/out", &b"x"[..]).unwrap();
    assert!(unpacked(&tar.into_inner().unwrap(), &into).is_err());

    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..6].copy_from_slice(b"../out");
    header.set_size(1);
    header.set_cksum();
    tar.append(&header, &b"x"[..]).unwrap();
    assert_eq!(unpacked(&tar.into_inner().unwrap(), &into).unwrap().len(), 1);
    assert!(!outer.path().join("out").exists());
}

#[test]
fn a_stream_that_breaks_off_is_an_error() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(source.path().join("file"), vec![7; 10_000]).unwrap();
    let (stream, _) = packed(&source.path().join("file"), "file");
    assert!(unpacked(&stream[..5000], target.path()).is_err());
}

#[test]
fn places_are_docker_s() {
    let at = |directory: &str, name: &str| Ok(Place { directory: directory.into(), name: name.into() });
    // Files.
    assert_eq!(place("a/f", false, "/x/new", Found::Missing), at("/x", "new"));
    assert_eq!(place("a/f", false, "/new", Found::Missing), at("/", "new"));
    assert_eq!(place("a/f", false, "new", Found::Missing), at(".", "new"));
    assert_eq!(place("a/f", false, "/x/old", Found::File), at("/x", "old"));
    assert_eq!(place("a/f", false, "/x", Found::Directory), at("/x", "f"));
    assert_eq!(place("a/f", false, "/x/", Found::Missing), Err(PlaceError::NoDirectory("/x/".into())));
    // Directories.
    assert_eq!(place("a/d", true, "/x/new/", Found::Missing), at("/x", "new"));
    assert_eq!(place("a/d/.", true, "/x/new", Found::Missing), at("/x", "new"));
    assert_eq!(place("a/d/", true, "/x", Found::Directory), at("/x", "d"));
    assert_eq!(place("a/d/.", true, "/x", Found::Directory), at("/x", "."));
    assert_eq!(place("/", true, "/x", Found::Directory), at("/x", "."));
    assert_eq!(place("a/d", true, "/x/old", Found::File), Err(PlaceError::OntoFile("/x/old".into())));
}
