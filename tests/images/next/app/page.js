export const dynamic = "force-dynamic";

export default function Page({ searchParams }) {
  return <h1>Hello, {searchParams.name ?? "stranger"}</h1>;
}
